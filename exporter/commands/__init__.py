"""Groups of commands, their options, and what they print."""
