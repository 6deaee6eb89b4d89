"""What a run will cost, on paper: FLOPs, memory, communication, time and money."""
