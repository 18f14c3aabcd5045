"""The decoder every method is measured in."""
