"""Ready-made rewards, one file a theme."""
