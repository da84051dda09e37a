"""What an engine's scheduler keeps, whichever engine it is. No torch here."""
