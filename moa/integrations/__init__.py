"""Other people's libraries, each in a file of its own and imported by whoever asks for it; none is needed by moa."""
