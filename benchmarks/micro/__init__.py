"""The parts of the microbenchmarks: shapes, inputs, providers, the table of cases, the gate, the clock, the rows."""
