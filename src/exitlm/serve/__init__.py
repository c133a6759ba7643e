"""An OpenAI-compatible server for many clients at once, and the engine behind it for programs that use asyncio."""
