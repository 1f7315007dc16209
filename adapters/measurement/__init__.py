"""What a steering does, for good and bad: margins, KL, fluency, with intervals."""
