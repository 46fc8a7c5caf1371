"""The model behind a page and behind an API: what strangers may send, and how they are answered."""
