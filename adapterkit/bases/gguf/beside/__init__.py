"""Files of llama.cpp and Ollama beside a GGUF model."""
