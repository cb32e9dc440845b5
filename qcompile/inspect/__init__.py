"""Looking inside: what a compiled step does, saves and remembers."""
