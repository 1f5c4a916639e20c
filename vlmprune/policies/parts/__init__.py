"""What methods are made of, where a step is long or several share it: frames and tiles, clusters, greedy rules, merging."""
