"""Numbers of fewer bits: what they are worth and how they are made."""
