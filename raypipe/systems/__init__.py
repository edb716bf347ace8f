"""The published methods: examples in, trained part out, answers judged; and the summaries they all read."""
