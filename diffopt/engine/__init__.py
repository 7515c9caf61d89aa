"""The engine: validated requests, one worker per pipeline, pictures with their metadata."""
