"""The same of a server: what it is asked, what it answered, and what that means."""
