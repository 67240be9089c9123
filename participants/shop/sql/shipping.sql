-- What was handed to the carrier. The label names the charge and the reservation behind it.
CREATE TABLE IF NOT EXISTS shipments (
    shipment_number INTEGER PRIMARY KEY AUTOINCREMENT,
    saga_id TEXT NOT NULL,
    order_id TEXT NOT NULL,
    address TEXT NOT NULL,
    label TEXT NOT NULL
);
