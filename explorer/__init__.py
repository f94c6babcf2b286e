"""``qstar explore``: a local page to decode with one's own eyes; needs FastAPI and uvicorn."""
