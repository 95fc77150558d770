"""The decoder that runs by default: it draws what `sample.sample` draws, in less time."""
