"""Learning while decoding: a Q that learns from a planner's own searches, in one process or from workers."""
