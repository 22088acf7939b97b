"""Files that survive a full disk, lost power, `kill -9` and several writers."""
