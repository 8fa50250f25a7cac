"""Behind chat.py: the page, its models, conversations and votes."""
