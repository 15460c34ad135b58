"""A plan as a picture, and the words that its text and its picture share."""
