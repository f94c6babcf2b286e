"""Language models of llama.cpp: any GGUF file, with a token tree in llama.cpp's own memory."""
