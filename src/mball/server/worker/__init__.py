"""One process per model: its HTTP side on a unix socket, its text, and the manager's verbs."""
