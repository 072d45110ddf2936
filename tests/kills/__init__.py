"""Passes that are killed -9 at random moments, and made again until one comes to its end."""
