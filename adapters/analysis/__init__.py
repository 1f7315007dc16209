"""What a unit does: the tokens it promotes, and which units do the same."""
