"""The comparison of SFT, SOAR and its relatives on Shapes: arms, runs, measures, tables."""
