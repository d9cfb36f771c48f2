"""The open-loop replay of a trace against an OpenAI-compatible endpoint."""
