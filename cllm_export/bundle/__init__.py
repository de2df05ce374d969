"""The bundle: the directory that the exporter hands to the runtime. Nothing here exports or runs anything."""
