"""What the program does beside training one stage."""
