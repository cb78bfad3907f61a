"""Implementations that come with isoform, registered like anybody else's: by entry point."""
