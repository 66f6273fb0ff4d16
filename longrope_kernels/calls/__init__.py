"""What a call hands down, and the checks of what came in."""
