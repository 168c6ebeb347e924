"""Count the rooms and the floors of `hpo/`: modules, packages, the longest chain of imports, and circles.

A module stands one floor above the highest module that it imports. Modules that import each other in a circle share a
floor. Imports under `TYPE_CHECKING` count like every other import.

    python -m scripts.bench.floors              # the package that Python finds
    python -m scripts.bench.floors --chain      # with the chain of imports that makes the floors
"""

from __future__ import annotations

import argparse

import grimp
import networkx


def import_graph(package: str, *, exclude_type_checking: bool) -> networkx.DiGraph:
    """Return the graph of a package's modules, with an edge from each module to each one that it imports."""
    imports = grimp.build_graph(package, exclude_type_checking_imports=exclude_type_checking, cache_dir=None)
    graph = networkx.DiGraph()
    graph.add_nodes_from(imports.modules)
    for module in imports.modules:
        graph.add_edges_from((module, imported) for imported in imports.find_modules_directly_imported_by(module))
    # A package without code of its own stands for its modules; importing `hpo` itself only names the package.
    graph.remove_node(package)
    return graph


def room_graph(graph: networkx.DiGraph) -> networkx.DiGraph:
    """Return the graph of the rooms: the packages and modules directly in the package, with what they import."""
    rooms = networkx.quotient_graph(
        graph, lambda first, second: first.split(".")[:2] == second.split(".")[:2], create_using=networkx.DiGraph
    )
    return networkx.relabel_nodes(rooms, lambda members: ".".join(min(members).split(".")[:2]))


def circles(graph: networkx.DiGraph) -> list[list[str]]:
    """Return the groups of modules that import each other, each sorted."""
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def floors(graph: networkx.DiGraph) -> list[list[str]]:
    """Return the longest chain of imports from the top, with the modules of each floor's circle (mostly one)."""
    condensed = networkx.condensation(graph)
    return [sorted(condensed.nodes[node]["members"]) for node in networkx.dag_longest_path(condensed)]


def main() -> None:
    """Print the counts of a package."""
    parser = argparse.ArgumentParser(description="Count the rooms, the floors and the circles of a package.")
    parser.add_argument("package", nargs="?", default="hpo")
    parser.add_argument("--chain", action="store_true", help="print the longest chain of imports, too")
    arguments = parser.parse_args()
    graph = import_graph(arguments.package, exclude_type_checking=False)
    at_run_time = import_graph(arguments.package, exclude_type_checking=True)
    packages = {module.rpartition(".")[0] for module in graph} - {arguments.package}
    top_level = [module for module in graph if module.count(".") == 1 and module not in packages]
    print(f"{len(graph) - len(packages)} modules, {len(top_level)} of them side by side in {arguments.package}/")
    print(f"{len(packages)} rooms")
    print(f"{len(floors(room_graph(graph)))} floors of rooms, with {len(circles(room_graph(graph)))} circles")
    print(f"{len(floors(graph))} floors of modules ({len(floors(at_run_time))} without type-checking imports)")
    print(f"{len(circles(graph))} circles of modules ({len(circles(at_run_time))} without type-checking imports)")
    for circle in circles(graph):
        print(f"  {', '.join(circle)}")
    if arguments.chain:
        for number, members in enumerate(reversed(floors(graph))):
            print(f"{number:3}  {', '.join(members)}")


if __name__ == "__main__":
    main()
