"""What clients may ask for: the bodies of requests, checked field by field."""
