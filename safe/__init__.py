"""What keeps files and runs safe: the hub's files, states to resume from, folders of results."""
