"""One function per chart, from a labelled data set to Vega-Lite, without I/O."""
