"""Which channels go together: labels pass through the graph, equalities become units."""
