"""One function a chart: from a labelled data set to Vega-Lite, and no I/O."""
