"""Reference tasks: each is trained with several methods and seeds, measured, and put beside the published figures."""
