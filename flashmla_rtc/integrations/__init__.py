"""What ties the package to others: each module needs the package that it is named after."""
