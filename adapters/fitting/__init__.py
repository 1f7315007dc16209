"""How strongly to steer: every strength, and the choice among candidates under the budget."""
