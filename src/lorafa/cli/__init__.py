"""The command line: one file a command, and the frame around them."""
