"""The gateway: OpenAI's paths for many models behind one address; bytes pass through it unchanged."""
