"""What passes cost, what drafts are worth, and which pass runs next. None of it changes a token."""
