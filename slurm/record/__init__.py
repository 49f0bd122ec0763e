"""The frozen record of a run: its directory, code, environment and inputs; read, compared and verified."""
