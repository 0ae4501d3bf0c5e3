"""What worker and operator share, and a sender can do without."""
