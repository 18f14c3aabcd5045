"""What is allocated, when, and what for."""
