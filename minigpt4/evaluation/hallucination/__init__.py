"""What captions and answers say about objects that are not there: CHAIR, and yes-or-no questions as in POPE."""
