"""The loss in other people's training loops; each module here needs the framework of its name."""
