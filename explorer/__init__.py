"""Explorer: a local page to watch searches, which ``qstar explore`` serves; needs FastAPI and uvicorn."""
