"""What written reports are judged by."""
