"""Predicted and published efficiency of every published table. Prints the errors in points.

    python -m many_machines.predictor_error    # in the folder notebooks

All tables are predicted with the same defaults: nothing is fitted to a table.
"""

from collections.abc import Iterator

from many_machines.published import OTHER_TABLES, TABLES, Table

from cnnlab import predict


def rows(tables: list[Table] = TABLES) -> Iterator[tuple[Table, int, float, float]]:
    """(table, devices, predicted efficiency, published efficiency) of each row of each table."""
    for table in tables:
        predictions = predict(table.spec)["predictions"]
        efficiency = {entry["devices"]: entry["efficiency"] for entry in predictions}
        base = efficiency[min(table.rates)]
        for devices, measured in table.measured.items():
            yield table, devices, efficiency[devices] / base, measured


def mean_error(tables: list[Table] = TABLES) -> float:
    """Mean absolute error of the efficiency over all rows, in points."""
    errors = [abs(predicted - measured) for _, _, predicted, measured in rows(tables)]
    return 100 * sum(errors) / len(errors)


def main() -> None:
    for tables in (TABLES, OTHER_TABLES):
        print("| model, cluster | stack | devices | predicted | published | error in points |")
        print("|-|-|-|-|-|-|")
        for table, devices, predicted, measured in rows(tables):
            error = 100 * (predicted - measured)
            figures = f"{100 * predicted:.1f}% | {100 * measured:.1f}% | {error:+.1f}"
            print(f"| {table.name} | {table.stack} | {devices} | {figures} |")
        count = sum(len(table.measured) for table in tables)
        print(f"\nmean absolute error: {mean_error(tables):.1f} points over {count} rows\n")


if __name__ == "__main__":
    main()
