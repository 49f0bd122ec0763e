"""One program a stage; a stage never imports another."""
