//! One cell of an Arrow column as JSON.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowDictionaryKeyType, ArrowPrimitiveType, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef};
use arrow_schema::DataType;
use serde_json::{Map, Value};

/// The value at `row`, or what about its type cannot be read. Numbers that are not finite become null, as in JSON.
pub(super) fn json_value(array: &ArrayRef, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    match array.data_type() {
        DataType::Null => Ok(Value::Null),
        DataType::Boolean => Ok(array.as_boolean().value(row).into()),
        DataType::Utf8 => Ok(array.as_string::<i32>().value(row).into()),
        DataType::LargeUtf8 => Ok(array.as_string::<i64>().value(row).into()),
        DataType::Utf8View => Ok(array.as_string_view().value(row).into()),
        DataType::List(_) => list(&array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(_, _) => list(&array.as_fixed_size_list().value(row)),
        DataType::Struct(_) => object(array, row),
        DataType::Dictionary(key, _) => dictionary(array, key, row),
        DataType::Float32 => {
            let value = number::<Float32Type>(array, row);
            Ok(value.to_string().parse::<f64>().map_or(Value::Null, Value::from))
        }
        DataType::Float64 => Ok(number::<Float64Type>(array, row).into()),
        other => integer(array, other, row),
    }
}

fn number<T: ArrowPrimitiveType>(array: &ArrayRef, row: usize) -> T::Native {
    array.as_primitive::<T>().value(row)
}

fn integer(array: &ArrayRef, data_type: &DataType, row: usize) -> Result<Value, String> {
    Ok(match data_type {
        DataType::Int8 => number::<Int8Type>(array, row).into(),
        DataType::Int16 => number::<Int16Type>(array, row).into(),
        DataType::Int32 => number::<Int32Type>(array, row).into(),
        DataType::Int64 => number::<Int64Type>(array, row).into(),
        DataType::UInt8 => number::<UInt8Type>(array, row).into(),
        DataType::UInt16 => number::<UInt16Type>(array, row).into(),
        DataType::UInt32 => number::<UInt32Type>(array, row).into(),
        DataType::UInt64 => number::<UInt64Type>(array, row).into(),
        other => {
            return Err(format!("type {other} is not supported: expected text, numbers, booleans, lists, structs"));
        }
    })
}

fn list(items: &ArrayRef) -> Result<Value, String> {
    (0..items.len()).map(|row| json_value(items, row)).collect::<Result<Vec<_>, _>>().map(Value::Array)
}

fn object(array: &ArrayRef, row: usize) -> Result<Value, String> {
    let array = array.as_struct();
    let mut fields = Map::new();
    for (field, column) in array.fields().iter().zip(array.columns()) {
        fields.insert(field.name().clone(), json_value(column, row)?);
    }
    Ok(Value::Object(fields))
}

fn dictionary(array: &ArrayRef, key: &DataType, row: usize) -> Result<Value, String> {
    fn entry<K: ArrowDictionaryKeyType>(array: &ArrayRef, row: usize) -> Result<Value, String> {
        let array = array.as_dictionary::<K>();
        let key = array.key(row).ok_or("a dictionary key is out of range")?;
        json_value(array.values(), key)
    }
    match key {
        DataType::Int8 => entry::<Int8Type>(array, row),
        DataType::Int16 => entry::<Int16Type>(array, row),
        DataType::Int32 => entry::<Int32Type>(array, row),
        DataType::Int64 => entry::<Int64Type>(array, row),
        DataType::UInt8 => entry::<UInt8Type>(array, row),
        DataType::UInt16 => entry::<UInt16Type>(array, row),
        DataType::UInt32 => entry::<UInt32Type>(array, row),
        DataType::UInt64 => entry::<UInt64Type>(array, row),
        other => Err(format!("dictionary keys of type {other} are not supported")),
    }
}
